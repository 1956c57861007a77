"""The daemon as a process: start and end, settings, backup, audit, limits of the system."""
