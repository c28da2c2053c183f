"""For testing serving loops: a fake data plane that checks every page it reads, and fleets of local processes."""
