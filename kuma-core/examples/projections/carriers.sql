-- Miles, flights and mean delay by carrier. Fed with flights-sample.ndjson, or the whole year.
--
-- projection: carriers
-- version: 1
-- erasure: none (sums over all aircraft of a carrier; no row is about one aircraft)

CREATE TABLE carrier (
    code      TEXT    NOT NULL PRIMARY KEY,
    flights   INTEGER NOT NULL,
    cancelled INTEGER NOT NULL,
    miles     INTEGER NOT NULL,
    -- Flights that arrived where they were to, and by how much they were late, in all. Diverted ones have no delay.
    arrivals  INTEGER NOT NULL,
    delay_min INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What is meant to be read: a mean cannot be added to, the sums that it is made of can.
CREATE VIEW carriers AS
SELECT code, flights, cancelled, miles, round(1.0 * delay_min / arrivals, 1) AS mean_delay_min
FROM carrier
ORDER BY miles DESC;

-- on aircraft.Flown
INSERT INTO carrier (code, flights, cancelled, miles, arrivals, delay_min)
VALUES (
    :data ->> 'carrier',
    1,
    0,
    :data ->> 'distance_mi',
    :data ->> 'arr_delay_min' IS NOT NULL,
    coalesce(:data ->> 'arr_delay_min', 0)
)
ON CONFLICT (code) DO UPDATE SET
    flights   = flights + 1,
    miles     = miles + excluded.miles,
    arrivals  = arrivals + excluded.arrivals,
    delay_min = delay_min + excluded.delay_min;

-- on aircraft.Cancelled
INSERT INTO carrier (code, flights, cancelled, miles, arrivals, delay_min)
VALUES (:data ->> 'carrier', 0, 1, 0, 0, 0)
ON CONFLICT (code) DO UPDATE SET cancelled = cancelled + 1;
