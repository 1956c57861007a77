"""The agent that trains beside the data and sends updates."""
