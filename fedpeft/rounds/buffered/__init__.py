"""Buffered asynchronous rounds (FedBuff): tasks in flight, the buffer and its sum."""
