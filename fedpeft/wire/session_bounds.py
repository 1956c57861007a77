"""Bounds of what a server may say to an agent, which both ends keep to."""

from __future__ import annotations

# The agent says something at least as often: more often wears out a battery and a metered line, and an agent
# that may be silent for longer is missed too late.
HEARTBEAT_MS = range(100, 3_600_000 + 1)
INLINE_BYTES = range(1024 * 1024 + 1)  # of a body within a message; 256 of them may wait at an agent
CHUNK_BYTES = range(1024, 4 * 1024 * 1024 + 1)  # of a blob's pieces: half of what one message may weigh
NAME_CHARACTERS = 256  # of a run, a kind of task, an agent
TASK_ID_BYTES, DIGEST_BYTES = 16, 32
