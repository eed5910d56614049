"""Scaling laws: the published ones, and the three fits of Hoffmann et al. 2022.

Letters used throughout: C training FLOPs, N parameters, D training tokens, L loss in nats per
token, and C = 6 N D. Which N a law counts is part of the law.
"""
