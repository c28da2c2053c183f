"""For testing serving loops: ranks in virtual time that check every page they read, traces, fleets of local processes."""
