"""The load generator: sends messages to a server and measures each phase.

Read in this order: plan.py (what to send) and schedule.py (when), resolve.py (where to), texts.py (the messages),
session.py (one connection), generator.py and pace.py (which session starts what), counts.py (what is counted),
workers.py (several processes). On a finished run: report.py (terminal), page.py and plot.py (HTML), thresholds.py (pass
or fail), compare.py (two runs), search.py (the highest sustainable rate).
"""
