"""The study of the paper's claims on the built-in world: its plan, its runs, their records, and what they show."""
