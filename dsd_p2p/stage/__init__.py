"""One stage of a route: admits sessions, runs its span over their windows, parks finished texts."""
