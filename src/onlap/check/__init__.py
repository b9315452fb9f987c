"""What a root holds against what it should hold, and how it is made whole again."""
