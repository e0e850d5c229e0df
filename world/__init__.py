"""The miniature's world: scenes, what is said about them, and the data set on disk."""
