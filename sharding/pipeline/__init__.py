"""A pipeline from its grid of tasks: checked, timed, and executed in the manual region. Schedules lie in
`sharding/schedules/`.
"""
