"""The apps of fedpeft as Flower loads them: each module assigns one, since Flower looks for an assignment."""
