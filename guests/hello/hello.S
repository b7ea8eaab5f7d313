/* hello: says that it runs, with its very first instructions, and sleeps.  What comes before the byte on COM1 is
 * all of a VM's start-up and nothing of a guest's. */

    .text
    .code32
    .globl pvh_start
pvh_start:
    movw $0x3F8, %dx
    movb $'!', %al
    outb %al, %dx
    cli
1:  hlt
    jmp 1b

    .section .note.GNU-stack, "", @progbits
