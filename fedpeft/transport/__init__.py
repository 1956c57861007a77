"""Messages and grids in Flower's types, without policy: tasks, rosters, mailboxes."""
