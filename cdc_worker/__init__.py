"""Change data capture for PostgreSQL CRMs: every committed change becomes a system activity, exactly once.

One loop: transactions of the slot are transformed into a batch, the sink writes the batch with its checkpoint in one
database transaction, and only then the server is told that it may forget.

    socket ─bytes─▶ protocol ─payload─▶ Decoder  ─Begin|Change|Message|Commit─▶ Assembler ─Transaction─▶ Transformer
       ▲                                                                                                   │ Activity |
       └── standby status update ◀── position ◀── Sink ◀───────────────────── Batch ◀──────────────────────┘ DeadLetter

In reading order. The core takes values and returns values:

    failpoints  where tests let a process end
    errors      every way to fail, and what it asks of the operator
    lsn         a position in the WAL
    values      what columns hold, from how Postgres prints it
    protocol    the messages inside COPY BOTH
    changes     what happened in the database, and the transactions it adds up to
    wal2json    a decoder
    documents   what the same plugin writes in format 1
    pgoutput    the other decoder
    decoders    what the two have in common
    context     who did it, as applications say it
    activities  what it meant: activities, dead letters, skipped rows, batches, positions, keys
    profile     what a CRM's tables mean, as read from TOML
    templates   its values, templates and conditions, compiled
    rules       its rules, compiled
    history     what is recorded of a row
    truth       whether that is true
    reconcile   what is missing, made up for
    written     what its rules write to each column
    transform   transactions to activities
    recording   the lines in which transactions are kept
    kept        dead letters, as they are kept
    watchdog    who owes a sign of life

The edges each know one thing outside:

    config      settings
    log         structured logs
    console     the terminal
    vitals      what a process knows of itself, in numbers
    postgres    connections, SQLSTATEs
    partitions  whose the changes of partitions are
    catalog     the tables as the database has them, and whether a profile fits
    ddl         changes of the database's structure, in steps that hardly wait
    checkpoint  how far a worker has written, and who may write
    gap         what could not be recorded, until it is made up for
    slot        the server's promise to keep WAL
    publication what pgoutput reads by
    process     the processes of a worker: which is active, what went wrong
    fence       positions that a worker is to have passed
    rows        rows of captured tables, as they are now
    journal     what is recorded of them
    watch       does it harm the server, is it held up
    replication the replication connection
    recorder    keeps what the stream has brought, in segments
    coverage    which commits have been read
    ledger      and which of those that were asked for are missing
    blocks      the lines of files, plain or compressed, whole or damaged
    reading     the transactions of one file of a recording
    segments    reads recordings, whole or damaged
    lines       activities as lines of COPY
    sink        the writing connection
    lookups     the connection that fetches rows of other tables
    backfill    rows that were there before the worker
    late        activities that come later than the stream would have brought them
    unplaced    recordings that don't say where their transactions were committed
    replay      recordings, told again
    ours        the worker's own rows of the target
    rewrite     activities that become what the profile says now
    dead_letters  changes that could not become activities, seen to
    skips       messages that are passed over
    verify      rows against their log
    cutover     from triggers or the application's own code to the worker, and back
    setup       tables, identities, grants, slot, cut-over
    teardown    the slot, and all that setup made
    switch_plugin  the slot, read with the other plugin
    subjects    whose rows of the target are
    erasure     persons who are to be forgotten
    feed        activities as people read them, whoever wrote them; feed_listing: in a terminal
    status      what a person on call asks
    checks      what a check sees and says: server_, table_, target_, slot_checks
    doctor      all checks
    places      on which lines of a TOML text its keys stand
    profile_…   for who writes a profile: _checks, _listing, _trial, _draft
    stop        a request to end, by signal
    tracing     a span for each batch
    stream      the loop over the sockets, of one connection's worth
    observer    what was last seen of the worker's state, for an hour
    metrics     both, for Prometheus
    web         both, and a page, over HTTP
    service_manager  what systemd hears of it
    worker      what opens it, and keeps it going
    recover     what leads on where nothing keeps what comes next
    cli         the command line

And for a look without a CRM: binaries and cluster (a private PostgreSQL), shadow (a second witness), sales_day,
timeline and demo.

As a library: `replication.Replication` and the decoders are a client of logical replication of their own.
"""

__version__ = "0.1.0"
