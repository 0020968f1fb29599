// SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
/*
 * A bad network for the lab, at TC: drops, duplicates and holds back TCP
 * segments (or UDP datagrams) of one port in one direction, by chance or the first few, and counts
 * what it did.  What is held goes to another interface, from where impair.py
 * sends it later: that is how segments overtake each other.
 *
 * Has a parser of its own: an instrument must not share what it measures.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#define PER_MILLION 1000000

/* Carried by what was impaired once already; a veth into another namespace clears it. */
#define IMPAIRED_MARK 0x1abe1

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define PROTOCOL_TCP   6

/* impair.py: _RULE */
struct rule {
	u32 source_port; /* host order, 0: any */
	u32 destination_port;
	u32 flags;	   /* only segments with one of these TCP flags, 0: all */
	u32 payload_bytes; /* only segments with at least so much payload */
	u32 drop_ppm;
	u32 duplicate_ppm;
	u32 hold_ppm;
	u32 hold_ifindex;
	u32 drop_verdict; /* TC_ACT_* for what is dropped */
	u32 skip;	  /* so many matching segments are left alone first */
	u32 protocol;
};

/* impair.py: COUNTS */
enum {
	MATCHED,
	DROPPED,
	DUPLICATED,
	HELD,
	COUNTS,
};

BPF_ARRAY(rules, struct rule, 1);
BPF_ARRAY(budget, u64, 1); /* impairments that may still happen */
BPF_ARRAY(seen, u64, 1);   /* matching segments so far, for rule.skip */
BPF_PERCPU_ARRAY(random, u64, 1);
BPF_PERCPU_ARRAY(counts, u64, COUNTS);

static inline void count(int index)
{
	u64 *value = counts.lookup(&index);

	if (value)
		*value += 1;
}

/* splitmix64: one addition of state, so that any seed will do. */
static inline u32 draw(void)
{
	int zero = 0;
	u64 *state = random.lookup(&zero);
	u64 bits;

	if (!state)
		return PER_MILLION;
	*state += 0x9e3779b97f4a7c15ULL;
	bits = *state;
	bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
	bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
	bits ^= bits >> 31;
	return (u32)(bits >> 32) % PER_MILLION;
}

static inline int matches(struct __sk_buff *skb, struct rule *rule)
{
	u16 type, ports[2], network_bytes;
	u8 first, protocol, offset, flags;
	u32 at, header_bytes;

	if (bpf_skb_load_bytes(skb, 12, &type, 2) || bpf_skb_load_bytes(skb, 14, &first, 1))
		return 0;
	if (type == htons(ETHERTYPE_IPV4)) {
		bpf_skb_load_bytes(skb, 14 + 9, &protocol, 1);
		bpf_skb_load_bytes(skb, 14 + 2, &network_bytes, 2);
		header_bytes = (first & 15) * 4;
		network_bytes = ntohs(network_bytes);
	} else if (type == htons(ETHERTYPE_IPV6)) {
		bpf_skb_load_bytes(skb, 14 + 6, &protocol, 1);
		bpf_skb_load_bytes(skb, 14 + 4, &network_bytes, 2);
		header_bytes = 40;
		network_bytes = ntohs(network_bytes) + 40;
	} else {
		return 0;
	}
	at = 14 + header_bytes;
	if (protocol != rule->protocol || bpf_skb_load_bytes(skb, at, ports, 4))
		return 0;
	if (rule->source_port && ntohs(ports[0]) != rule->source_port)
		return 0;
	if (rule->destination_port && ntohs(ports[1]) != rule->destination_port)
		return 0;
	if (protocol != PROTOCOL_TCP)
		return 1;
	if (bpf_skb_load_bytes(skb, at + 12, &offset, 1) ||
	    bpf_skb_load_bytes(skb, at + 13, &flags, 1))
		return 0;
	if (rule->flags && !(flags & rule->flags))
		return 0;
	return network_bytes >= header_bytes + (offset >> 4) * 4 + rule->payload_bytes;
}

int pycopy_impair(struct __sk_buff *skb)
{
	int zero = 0;
	struct rule *rule = rules.lookup(&zero);
	u64 *left = budget.lookup(&zero);
	u64 *before = seen.lookup(&zero);
	u32 chance;

	if (!rule || !left || !before || skb->mark == IMPAIRED_MARK || !matches(skb, rule))
		return TC_ACT_UNSPEC;
	count(MATCHED);
	*before += 1;
	if (!*left || *before <= rule->skip)
		return TC_ACT_UNSPEC;
	chance = draw();
	if (chance < rule->drop_ppm) {
		*left -= 1;
		count(DROPPED);
		if (rule->drop_verdict == TC_ACT_REDIRECT)
			return bpf_redirect(0, 0); /* TCX does not know TC_ACT_STOLEN */
		return rule->drop_verdict;
	}
	chance -= rule->drop_ppm;
	if (chance < rule->duplicate_ppm) {
		*left -= 1;
		count(DUPLICATED);
		skb->mark = IMPAIRED_MARK;
		bpf_clone_redirect(skb, skb->ifindex, 0);
		skb->mark = 0;
		return TC_ACT_UNSPEC;
	}
	chance -= rule->duplicate_ppm;
	if (chance < rule->hold_ppm) {
		*left -= 1;
		count(HELD);
		return bpf_redirect(rule->hold_ifindex, 0);
	}
	return TC_ACT_UNSPEC;
}
