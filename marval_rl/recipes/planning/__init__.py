"""`--dry_run`: what a recipe would train, its memory, and what is missing."""
