"""Pipeline schedules, one file each, found by their place: a frozen dataclass whose `grid(stages)` says who does what
when.
"""
