"""The front: Envoy on the public ports, and the door, which Envoy asks about each request before Triton sees it."""
