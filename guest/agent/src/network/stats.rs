// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What the links have carried.

use std::fs;

use ecr_agent_protocol::agent::NetworkStats;

const COUNTERS: &str = "/proc/net/dev";

/// The counters of every link of the guest.
pub fn stats() -> Vec<NetworkStats> {
    parse(&fs::read_to_string(COUNTERS).unwrap_or_default())
}

/// proc_net(5): after two lines of headings, `NAME:` and sixteen numbers.
fn parse(table: &str) -> Vec<NetworkStats> {
    table
        .lines()
        .skip(2)
        .filter_map(|line| {
            let (name, numbers) = line.rsplit_once(':')?;
            let mut numbers = numbers.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
            let mut all = [0; 16];
            for number in &mut all {
                *number = numbers.next()??;
            }
            let [
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                ..,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                _,
                _,
                _,
                _,
            ] = all;
            Some(NetworkStats {
                name: name.trim().into(),
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                ..Default::default()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_as_linux_shows_them() {
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:    1000      10    0    0    0     0          0         0     1000      10    0    0    0     0       0          0
  eth0: 123456     789    1    2    3     4          5         6    654321     987    7    8    9     10      11         12
 bad0: 1 2 3
";
        let stats = parse(table);
        assert_eq!(stats.len(), 2);
        let eth0 = &stats[1];
        assert_eq!((eth0.name.as_str(), eth0.rx_bytes, eth0.rx_packets), ("eth0", 123_456, 789));
        assert_eq!((eth0.rx_errors, eth0.rx_dropped), (1, 2));
        assert_eq!((eth0.tx_bytes, eth0.tx_packets), (654_321, 987));
        assert_eq!((eth0.tx_errors, eth0.tx_dropped), (7, 8));
        assert!(parse("").is_empty());
    }
}
