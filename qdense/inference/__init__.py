"""Models that answer: a base and its adapters in memory, how they complete prompts, and how many clients share them."""
