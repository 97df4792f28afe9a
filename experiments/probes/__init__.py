"""Known miscompilations and collective bugs, one file each, found by their place. `docs/doctor.md` says how to add one."""
