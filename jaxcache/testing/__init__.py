"""Traces and replays; and the simulation: ranks in virtual time, without devices, under faults. For your tests too."""
