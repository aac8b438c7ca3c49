"""This folder is a package, so that the engine shared by its tests is closed after the last of them."""
