"""The coordinating side: finds a route, drafts, sends windows, streams the answer."""
