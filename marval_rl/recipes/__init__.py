"""Recipes: what one may say, how it is read, and what it would do (`--dry_run`)."""
