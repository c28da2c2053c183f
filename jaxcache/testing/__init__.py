"""For tests of serving loops: ranks in virtual time that check every page they read."""
