"""The planner: how many CPU sidecars beside so many GPUs for this traffic?

traffic.py              what arrives when: at random, in bursts, or as recorded
costs.py                what encoding it costs, by measurement; measured.json has what was measured already
measure.py              the same of a sidecar that runs now
simulation.py           a fleet of sidecars in virtual time
sidecar.py lane.py      one of them: its doors and preprocessing threads; its lanes
answer.py               fleets of growing size, the first that is quick enough, and from which rate on more of them help
report.py plot.py       for people and machines; for the eye
"""
