"""The mathematics under everything: functions, random numbers, and how they are compiled."""
