"""To the server and back: dialing, the session, certificates, the outbox, what left the device."""
