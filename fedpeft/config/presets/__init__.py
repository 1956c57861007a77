"""Run files that ship with the package."""
