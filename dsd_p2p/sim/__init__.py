"""DSD-Sim: the same core in virtual time, fed with recorded agreement."""
