"""One file a rule. A rule file holds a factory of the file's name, decorated with `sharding.rule.rule`."""
