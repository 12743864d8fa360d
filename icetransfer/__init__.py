"""Warm-start transfer of streaming speech recognisers: English-only or multilingual?"""
