"""The coordinator's side of a request: find a route, draft, send windows and stream the answer."""
