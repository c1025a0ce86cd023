CREATE TABLE models (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    quant TEXT NOT NULL,
    gguf_sha256 TEXT NOT NULL,
    adapter_sha256 TEXT NOT NULL,
    UNIQUE (name, quant, gguf_sha256, adapter_sha256)
);

CREATE TABLE conversations (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    channel TEXT NOT NULL,
    began_ms INTEGER NOT NULL
);

CREATE INDEX conversations_by_age ON conversations (began_ms);

CREATE TABLE turns (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    conversation INTEGER NOT NULL REFERENCES conversations (number) ON DELETE CASCADE,
    model INTEGER NOT NULL REFERENCES models (id),
    began_ms INTEGER NOT NULL,
    question TEXT NOT NULL,
    prompt TEXT NOT NULL,           -- JSON: the messages as the model was given them
    answer TEXT NOT NULL,
    outcome TEXT NOT NULL,
    search TEXT NOT NULL,           -- JSON: null, or reason, failure, sources
    timings_ms TEXT NOT NULL,       -- JSON
    prompt_tokens INTEGER,
    completion_tokens INTEGER
);

CREATE INDEX turns_by_conversation ON turns (conversation);

CREATE TABLE feedback (
    turn INTEGER PRIMARY KEY REFERENCES turns (number) ON DELETE CASCADE,
    rating TEXT CHECK (rating IN ('up', 'down')),
    correction TEXT,
    comment TEXT,
    given_ms INTEGER NOT NULL
);
