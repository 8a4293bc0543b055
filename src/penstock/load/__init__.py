"""The generator: load on a server, and what it felt like.

plan.py is what is to be sent, resolve.py where to, texts.py the messages, session.py a connection that sends them,
generator.py and pace.py who starts when, counts.py what is counted, report.py and page.py what is shown of it.
"""
