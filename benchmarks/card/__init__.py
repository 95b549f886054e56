"""A card's minutes as one command: a plan of phases, each in a process of its own, and one record."""
