"""The live wiring on trio: a stage's server and a coordinator's driver."""
