"""Bounds of one connection, one principal and one process.

limits             the numbers
effective_limits   the smaller of the hive's limit and a key's, and the refusal of more
streams            open streams of each principal that only listen
unfinished         messages whose bodies are still coming
turns              fair scheduling: how many requests of a principal begin in a turn of the event loop
deadlines          one timer that checks all timeouts
epoll_watches      a place in epoll for each connection, kept while it is not read
"""
