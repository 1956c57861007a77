"""The processes that train, confined, and what they remember between tasks."""
