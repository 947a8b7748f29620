"""DSD-Sim: runs the same core as live peers in virtual time, on recorded or parametric agreement."""
