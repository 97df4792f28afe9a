"""How arrays lie on devices: axes, rules, layouts, named ops, the train step. Pure: no files, no clock, no printing."""
