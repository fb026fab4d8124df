"""What a recipe may name and `btx ls` lists: each name in one list. No torch."""
