"""Load on an encoder sidecar, and what became of it. Knows the client and the contract, and nothing of the server's inside.

    pictures → mix → drive → tally → report, plot
    made       what    when    what    for people
               is sent         became of it

Whether anything is lost is counted twice, by separate hands: `drive` says what it sends, and each answer is noted as it
comes. The two sums must agree.
"""
