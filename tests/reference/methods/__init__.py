"""Published methods transcribed literally from their sources, one loop over tokens each.

Independent of `opd.methods` and `opd.formula`: what is written here is what the source says.
"""
