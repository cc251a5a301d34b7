"""What a generation gives back, whatever the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generated:
    """Tokens, and the times (seconds) at which prefill began and at which every token came."""

    tokens: list[int]
    times: list[float]

    def prefill_tokens_per_s(self, prompt_tokens: int) -> float:
        return prompt_tokens / max(self.times[1] - self.times[0], 1e-9) if len(self.times) > 1 else 0.0

    def decode_tokens_per_s(self) -> float:
        return (len(self.times) - 2) / max(self.times[-1] - self.times[1], 1e-9) if len(self.times) > 2 else 0.0
