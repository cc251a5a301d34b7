"""From a method and a budget to what is stored."""
