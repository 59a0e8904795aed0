-- Which aircraft flew most. Fed with flights-sample.ndjson, or the whole year.
--
-- projection: busiest_aircraft
-- version: 1
-- An aircraft is called by its tail number, which is the entity's id: what is erased there goes from here too.
-- erasure: column aircraft.tail

CREATE TABLE aircraft (
    tail       TEXT    NOT NULL PRIMARY KEY,
    flights    INTEGER NOT NULL,
    miles      INTEGER NOT NULL,
    air_min    INTEGER NOT NULL,
    last_from  TEXT    NOT NULL,
    last_to    TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX aircraft_by_flights ON aircraft (flights);

CREATE VIEW busiest_aircraft AS
SELECT * FROM aircraft ORDER BY flights DESC, tail LIMIT 20;

-- on aircraft.Flown
INSERT INTO aircraft (tail, flights, miles, air_min, last_from, last_to)
VALUES (
    :entity,
    1,
    :data ->> 'distance_mi',
    coalesce(:data ->> 'air_time_min', 0),
    :data ->> 'origin',
    :data ->> 'dest'
)
ON CONFLICT (tail) DO UPDATE SET
    flights   = flights + 1,
    miles     = miles + excluded.miles,
    air_min   = air_min + excluded.air_min,
    last_from = excluded.last_from,
    last_to   = excluded.last_to;
