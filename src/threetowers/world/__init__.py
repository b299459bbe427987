"""The built-in world: scenes, pictures and captions."""
