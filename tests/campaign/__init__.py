"""The fault campaign: what runs survive, as figures (`make campaign`; CONTRIBUTING.md says how). Not in the wheel."""
