"""Conversations that go on from compressed caches: one on a terminal, or several over HTTP."""
