"""The metadata store: a tree of inodes per bucket, extent maps, placements, segments.

Every function takes a Transaction, changes nothing on an error, and raises `network.errors`.
"""
